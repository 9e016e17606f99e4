"""PromptPAR: Pedestrian Attribute Recognition via CLIP based Prompt Vision-Language Fusion."""
