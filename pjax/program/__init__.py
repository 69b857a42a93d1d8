"""TODO pjax/program."""
