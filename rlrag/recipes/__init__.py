"""Complete configurations by name; a recipe is a function that returns one.

Each says what it needs and about how long it takes. Change single fields by flags; write a function
in one of these modules for a setting of your own.
"""

from __future__ import annotations

from collections.abc import Callable

from rlrag.config import RunConfig
from rlrag.recipes import hops, joint, jsa, retriever, selection

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "quickstart": hops.quickstart,
    "factbook": selection.factbook,
    "factbook-hops": hops.factbook_hops,
    "nq": selection.nq,
    "nq-dro": selection.nq_dro,
    "nq-dro-selector": selection.nq_dro_selector,
    "nq-dro-generator": selection.nq_dro_generator,
    "nq-sft": selection.nq_sft,
    "hotpotqa-dro": selection.hotpotqa_dro,
    "hotpotqa-dro-selector": selection.hotpotqa_dro_selector,
    "hotpotqa-dro-generator": selection.hotpotqa_dro_generator,
    "hotpotqa-sft": selection.hotpotqa_sft,
    "dro-paper": selection.dro_paper,
    "nq-openrag": retriever.nq_openrag,
    "nq-openrag-offline": retriever.nq_openrag_offline,
    "nq-openrag-online": retriever.nq_openrag_online,
    "nq-openrag-dense": retriever.nq_openrag_dense,
    "nq-jsa": jsa.nq_jsa,
    "nq-jsa-semi": jsa.nq_jsa_semi,
    "nq-jsa-joint": jsa.nq_jsa_joint,
    "2wiki-hops": hops.wiki_hops,
    "hotpotqa-hops": hops.hotpotqa_hops,
    "musique-hops": hops.musique_hops,
    "nq-full": joint.nq_full,
    "hotpotqa-full": joint.hotpotqa_full,
    "openrag-paper": retriever.openrag_paper,
}
