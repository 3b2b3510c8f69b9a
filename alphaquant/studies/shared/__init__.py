"""Work that workers share."""
