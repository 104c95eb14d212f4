"""Who may say that an image is trusted."""
