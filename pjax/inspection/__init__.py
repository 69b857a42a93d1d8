"""TODO pjax/inspection."""
