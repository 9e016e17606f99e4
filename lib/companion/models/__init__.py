"""What each paper adds, one file a paper, on backbones of timm and open_clip."""
