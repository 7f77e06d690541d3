"""Gymnasium environments; importing this package registers `rlrag/DocumentSelection-v1`.

The registration names its classes as text, so that the import loads Gymnasium and nothing else.
"""

from gymnasium.envs.registration import register

register(
    id="rlrag/DocumentSelection-v1",
    entry_point="rlrag.environment.document_selection:DocumentSelectionEnv",
    vector_entry_point="rlrag.environment.vector:DocumentSelectionVectorEnv",
)
