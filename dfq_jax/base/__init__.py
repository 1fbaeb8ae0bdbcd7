"""What everything else may use: files, words, settings, the machine."""
