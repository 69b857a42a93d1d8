"""TODO pjax/rules."""
