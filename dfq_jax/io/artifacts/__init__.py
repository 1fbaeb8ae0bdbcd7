"""What lies in output folders."""
