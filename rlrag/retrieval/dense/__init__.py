"""Dense retrieval: encoders, vectors and nearest-neighbour indexes."""
