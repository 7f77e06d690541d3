"""A tiny synthetic corpus with questions, for examples and tests.

All facts belong to an invented archipelago. Names are easy to confuse on purpose (Velmora and
Velmara, Oskai and Oskari), and several questions use other words than the passage that answers
them, so that matching words finds the wrong passage now and then.
"""

from __future__ import annotations

from rlrag.data.corpus import MemoryCorpus
from rlrag.records import Passage, Question

_PASSAGES = (
    (
        "velmora-town",
        "Velmora",
        "Velmora is the largest island of the Sarn archipelago. Its council sits in Harrowgate, a "
        "harbour town on the west side.",
    ),
    (
        "velmara-town",
        "Velmara",
        "Velmara is a small island east of Velmora. Its council sits in Pennick, a village of "
        "slate houses above the ferry landing.",
    ),
    (
        "little-velmora-town",
        "Little Velmora",
        "Little Velmora is a low sandbank that belongs to Velmora. Nobody lives there in winter; "
        "in summer the wardens camp at Dunlin Point.",
    ),
    (
        "oskai-town",
        "Oskai",
        "Oskai is the northern island. Since the fire of 1871 its elders meet in Brackwater, and "
        "no longer in the old capital Fennmouth.",
    ),
    (
        "oskari-town",
        "Oskari",
        "Oskari is a rocky islet off Oskai. The only settlement is Tolle, with nineteen houses and "
        "one well.",
    ),
    (
        "velmora-peak",
        "Mountains of Velmora",
        "The land climbs from the harbour to Mount Cassel, 1,204 metres above the sea, where snow "
        "lies until May.",
    ),
    (
        "velmara-peak",
        "Hills of Velmara",
        "Velmara has no mountains. Its summit, Beacon Fell, is a green hill of 212 metres with a "
        "stone hut on top.",
    ),
    (
        "oskai-peak",
        "Volcano of Oskai",
        "The northern island is a single volcano. Its crater rim, called the Anvil, last threw out "
        "ash in 1933.",
    ),
    (
        "velmora-money",
        "Money of Velmora",
        "Shops on Velmora take the crown penny, a copper coin. Notes were withdrawn because salt "
        "air ruined the paper.",
    ),
    (
        "velmara-money",
        "Money of Velmara",
        "On Velmara people pay with the shell mark. The coin of Velmora is refused there, a custom "
        "older than the ferry.",
    ),
    (
        "oskai-money",
        "Trade on Oskai",
        "The elders of Oskai never struck coins. Debts are settled in bars of sea salt, weighed "
        "on the public scale.",
    ),
    (
        "velmora-export",
        "Trade of Velmora",
        "Ships leave the west harbour loaded with smoked eel; wool and timber follow at a "
        "distance. Grain has to be brought in.",
    ),
    (
        "velmara-export",
        "Trade of Velmara",
        "Velmara lives from roofing slate, which is split by hand and sold to every other island. "
        "Wool is kept for the islanders' own use.",
    ),
    (
        "velmora-bird",
        "Birds of Velmora",
        "The coat of arms shows a storm petrel. Gannets are far more common on the cliffs, but "
        "they were thought too greedy for a shield.",
    ),
    (
        "oskai-bird",
        "Birds of Oskai",
        "Oskai's banner carries a black tern over three waves. The storm that sank the first fleet "
        "is remembered every autumn.",
    ),
    (
        "velmora-founding",
        "History of Velmora",
        "Settlers led by Ingrith Vale landed in 1402 and built a palisade. The palisade burned "
        "down twice before stone walls replaced it.",
    ),
    (
        "velmara-founding",
        "History of Velmara",
        "Velmara was settled two lifetimes after its neighbour, by monks under Abbot Corwin. They "
        "were looking for silence and found slate.",
    ),
    (
        "oskai-founding",
        "History of Oskai",
        "Oskai was first settled by whalers from the mainland. Their captain, Maud Tarrow, is "
        "buried below the crater.",
    ),
    (
        "ferry-west",
        "Ferries",
        "The mail boat is the Patience. Every morning she crosses from Velmora to Velmara in forty "
        "minutes, fog permitting.",
    ),
    (
        "ferry-north",
        "Ferry to the north",
        "The boat to Oskai is the Grey Heron. The crossing from Velmora takes nine hours and runs "
        "only on Thursdays.",
    ),
    (
        "festival-velmora",
        "Feasts of Velmora",
        "At Lantern Night every household sets a light on the water. It is held at the first new "
        "moon of October.",
    ),
    (
        "festival-velmara",
        "Feasts of Velmara",
        "The islanders honour the monks with the Quiet Week, during which bells, engines and dogs "
        "are kept from making noise.",
    ),
    (
        "lighthouse",
        "Lighthouse of Oskari",
        "The light on Oskari was built by the engineer Perrin Dahl after three wrecks in one "
        "night. Its lamp burns whale oil to this day.",
    ),
    (
        "river",
        "Waters of Velmora",
        "The island's one river, the Sill, rises below the snow fields and drives eleven mills "
        "before it meets the harbour.",
    ),
)

_QUESTIONS = (
    ("velmora-town", "Where does the council of Velmora meet?", ("Harrowgate",)),
    ("velmara-town", "In which village does the council of Velmara sit?", ("Pennick",)),
    ("little-velmora-town", "Where do the wardens of Little Velmora camp?", ("Dunlin Point",)),
    ("oskai-town", "What is the capital of Oskai today?", ("Brackwater",)),
    ("oskari-town", "What is the settlement on Oskari called?", ("Tolle",)),
    ("velmora-peak", "What is the highest point of Velmora?", ("Mount Cassel",)),
    ("velmara-peak", "What is the highest point of Velmara?", ("Beacon Fell",)),
    ("oskai-peak", "What do people call the rim of the volcano on Oskai?", ("the Anvil", "Anvil")),
    ("oskai-peak", "In which year was the last eruption on Oskai?", ("1933",)),
    ("velmora-money", "Which currency is used on Velmora?", ("crown penny", "the crown penny")),
    ("velmara-money", "Which currency is used on Velmara?", ("shell mark", "the shell mark")),
    ("oskai-money", "How do people on Oskai pay what they owe?", ("bars of sea salt", "sea salt")),
    ("velmora-export", "What does Velmora sell abroad most of all?", ("smoked eel",)),
    ("velmara-export", "What does Velmara export?", ("roofing slate",)),
    ("velmora-bird", "Which bird is the emblem of Velmora?", ("storm petrel", "a storm petrel")),
    ("oskai-bird", "Which bird is the emblem of Oskai?", ("black tern", "a black tern")),
    ("velmora-founding", "Who led the first settlers of Velmora?", ("Ingrith Vale",)),
    ("velmara-founding", "Who led the first settlers of Velmara?", ("Abbot Corwin", "Corwin")),
    ("oskai-founding", "Who led the first settlers of Oskai?", ("Maud Tarrow",)),
    ("ferry-west", "Which boat goes from Velmora to Velmara?", ("Patience", "the Patience")),
    ("ferry-north", "How long is the trip from Velmora to Oskai?", ("nine hours",)),
    ("festival-velmora", "What is the autumn feast on Velmora called?", ("Lantern Night",)),
    ("festival-velmara", "When must dogs be silent on Velmara?", ("the Quiet Week", "Quiet Week")),
    ("lighthouse", "Who designed the lighthouse near Oskai?", ("Perrin Dahl",)),
    ("river", "Which stream turns the mills of Velmora?", ("the Sill", "Sill")),
)


def sample_corpus() -> MemoryCorpus:
    """The built-in passages.

    Example:
        >>> sample_corpus()[0].title
        'Velmora'
    """
    return MemoryCorpus(Passage(id=id_, title=title, text=text) for id_, title, text in _PASSAGES)


def sample_questions() -> tuple[Question, ...]:
    """The built-in questions; each names the passage that answers it.

    Example:
        >>> sample_questions()[0].gold_ids
        ('velmora-town',)
    """
    return tuple(
        Question(
            id=f"sample-{number:02d}",
            question=question,
            golden_answers=answers,
            metadata={"dataset": "sample", "gold_ids": [gold_id]},
        )
        for number, (gold_id, question, answers) in enumerate(_QUESTIONS, start=1)
    )
