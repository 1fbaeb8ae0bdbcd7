"""What is optimised or drawn, and how it becomes images."""
