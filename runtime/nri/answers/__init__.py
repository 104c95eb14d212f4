"""What plugins answer, put together: each thing has one owner."""
