"""Models that several test files use, by kind, with inputs and checks of their own."""
