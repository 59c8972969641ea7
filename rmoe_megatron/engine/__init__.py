"""What takes optimizer steps with a model that is spread over the ranks of a job."""
