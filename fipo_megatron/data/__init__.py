"""Problems to train and evaluate on: from files and seeded task generators, through a resumable prompt sampler."""
