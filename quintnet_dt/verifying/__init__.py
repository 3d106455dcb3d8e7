"""A split model beside the whole one: one step of each, and where they differ."""
