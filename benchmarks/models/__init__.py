"""What becomes of the attention of unmodified models, and how exact it is: the survey."""
