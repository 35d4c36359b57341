"""What is trained beside a frozen base."""
