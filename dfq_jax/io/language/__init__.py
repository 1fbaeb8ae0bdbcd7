"""Networks of tokens from files that hold their weights alone: what is known of them is built."""
