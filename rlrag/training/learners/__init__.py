"""Optimiser steps of selector, generator and retriever, shared by the trainers."""
