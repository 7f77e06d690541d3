"""The World Factbook: its passages, and questions about them."""
