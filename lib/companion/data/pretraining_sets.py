"""Names of the sets of pretraining_sets.yaml."""

IMAGENET, COCO, ADE20K = "pretraining/imagenet-1k", "pretraining/coco", "pretraining/ade20k"
