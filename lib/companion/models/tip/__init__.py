"""TIP: Text-Driven Image Processing with Semantic and Restoration Instructions."""
