"""The callbacks that a user adds to a trainer."""
