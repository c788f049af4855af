"""What a device has: memory that is free, and limits that hold."""
