"""Words and pictures to numbers, and back; nothing here sees a network."""
