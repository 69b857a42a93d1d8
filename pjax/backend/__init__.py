"""TODO pjax/backend."""
