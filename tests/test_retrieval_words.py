from __future__ import annotations

from pathlib import Path

import pytest

from rlrag.config import RetrievalConfig
from rlrag.data.corpus import MemoryCorpus
from rlrag.records import Passage
from rlrag.retrieval.build import open_retrievers
from rlrag.retrieval.words import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # Plain English is split as ever: what an apostrophe joins to a word is none.
        ("The Nile isn't Africa's only long river", "nile isn africa only long river"),
        ("O'Brien and d’Artagnan don’t agree", "brien artagnan don agree"),
        ("Who's on Apollo 8, and what's vitamin K's role?", "who apollo 8 what vitamin k role"),
        ("World War I, U.S. and J. R. R. Tolkien", "world war i u s j r r tolkien"),
        ("C++, C# and C in g++", "c++ c# c g++"),
        # Pairs of characters, and each Chinese one.
        ("北京是首都。", "北京 京是 是首 首都 北 京 是 首 都"),
        ("東京 はどこ", "東京 東 京 はど どこ"),
        ("서울은 수도", "서울 울은 수도"),
        ("กรุงเทพ", "กรุ รุง งเ เท ทพ"),
        ("A型ウイルス2020年", "型ウ ウイ イル ルス 型 2020 年"),
        ("猫 き", "猫 き"),
        # A vowel sign belongs to its letter.
        ("दिल्ली भारत की राजधानी", "दिल्ली भारत की राजधानी"),
        ("مُحَمَّد", "مُحَمَّد"),
        # One spelling of what looks alike.
        ("Pele\u0301, na\u00efve", "pel\u00e9 na\u00efve"),
        ("ＡＢＣ８ｶﾞﾗｽ", "abc8 ガラ ラス"),
        ("co\u00adoperate 葛\U000e0100", "cooperate 葛"),
        ("", ""),
    ],
)
def test_words_of_a_text(text: str, words: str) -> None:
    assert split_words(text) == words.split()


@pytest.mark.parametrize(
    ("first", "best", "last", "question"),
    [
        ("京都には寺が多い。", "東京は日本の首都です。", "大阪の食べ物", "日本の首都はどこですか"),
        ("上海有港口。", "北京是中国的首都。", "长江很长。", "中国首都是哪里？"),
        ("咖啡来自非洲。", "绿茶很好喝。", "牛奶是白的。", "什么 茶"),
        ("ภูเก็ตเป็นเกาะ", "กรุงเทพมหานครเป็นเมืองหลวง", "แม่น้ำโขง", "เมืองหลวงคืออะไร"),
        ("부산은 항구이다.", "서울은 대한민국의 수도이다.", "제주는 섬이다.", "대한민국 수도는?"),
        ("मुंबई बड़ा शहर है", "दिल्ली राजधानी है", "गंगा नदी है", "दिल्ली"),
        ("C has pointers", "C++ has templates", "C# has events", "what does C++ have"),
        ("Apollo 7 tested", "Apollo 8 orbited", "Apollo 9 docked", "crew of Apollo 8"),
        ("vitamin C is in fruit", "vitamin K clots", "vitamin D needs sun", "vitamin K"),
    ],
)
def test_bm25_finds_the_passage(
    tmp_path: Path, first: str, best: str, last: str, question: str
) -> None:
    texts = (first, best, last)
    corpus = MemoryCorpus(Passage(str(row), "", text) for row, text in enumerate(texts))
    config = RetrievalConfig(kind="bm25", encoder=None, num_candidates=3)
    hits = open_retrievers(corpus, config, tmp_path).primary.search([question], 3)
    assert hits.rows_BK[0, 0] == 1
    assert hits.scores_BK[0, 0] > hits.scores_BK[0, 1]
