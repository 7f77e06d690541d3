"""Optimiser steps of selector, generator and retriever, used by the trainers."""
