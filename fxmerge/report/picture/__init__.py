"""Pictures of a network and its merge groups: a record of boxes and arrows, and the formats that show it."""
