"""Problems to train and evaluate on: seeded task generators and a resumable prompt sampler."""
