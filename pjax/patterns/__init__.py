"""TODO pjax/patterns."""
