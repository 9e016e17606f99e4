"""What each notebook trains live at the pocket profile."""
