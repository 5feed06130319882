"""What a site does, and what it keeps."""
