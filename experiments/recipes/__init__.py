"""What an entry of a comparison stands for, and its tuned settings."""
