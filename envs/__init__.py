"""Gymnasium environments; importing this package registers `rlrag/DocumentSelection-v1`.

The registration names its classes as text, so that the import loads Gymnasium and nothing else.
Where this package is not imported, the id with its module does both:
`gymnasium.make("envs:rlrag/DocumentSelection-v1")`.
"""

from gymnasium.envs.registration import register

register(
    id="rlrag/DocumentSelection-v1",
    entry_point="envs.document_selection:DocumentSelectionEnv",
    vector_entry_point="envs.vector:DocumentSelectionVectorEnv",
)
