"""A pytest plugin for Celery's tests: every app that they make has SessionTask as its default task class."""

from __future__ import annotations

from celery import Celery

# Where Celery itself names its default; an app that is given a class of its own keeps that.
Celery.task_cls = "celery_alchemy:SessionTask"
