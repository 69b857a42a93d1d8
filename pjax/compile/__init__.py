"""TODO pjax/compile."""
