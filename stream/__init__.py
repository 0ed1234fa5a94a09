"""The Kafka service, backfill, replay and demo: readings in, scores and alerts out."""
