"""Tests of the Kafka service."""
