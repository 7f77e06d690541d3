"""Gymnasium environments; importing this package registers those of this project.

The registration names its classes as text, so that the import loads Gymnasium and nothing else.
"""

from gymnasium.envs.registration import register

register(
    id="rlrag/DocumentSelection-v1",
    entry_point="rlrag.environment.document_selection:DocumentSelectionEnv",
    vector_entry_point="rlrag.environment.vector:DocumentSelectionVectorEnv",
)
register(
    id="rlrag/DocumentHops-v1",
    entry_point="rlrag.environment.document_hops:DocumentHopsEnv",
    vector_entry_point="rlrag.environment.document_hops:DocumentHopsVectorEnv",
)
