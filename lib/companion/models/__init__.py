"""The models of the papers, one folder per paper, on backbones of timm and open_clip."""
