"""DPLQ: Domain Prompt Learning with Quaternion Networks."""
