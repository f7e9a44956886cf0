"""The laws that every router keeps."""
