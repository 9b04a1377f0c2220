"""The executors under this scheduler: who has which sequence, who may come, who has to go."""
