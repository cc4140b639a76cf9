"""Low-Rank Clone: the student's weights are projections of a frozen teacher's."""
