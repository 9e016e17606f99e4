"""SIC-CADS: Simple Image-level Classification Improves Open-vocabulary Object Detection."""
