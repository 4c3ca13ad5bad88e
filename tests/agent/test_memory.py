"""Words in shared memory: a step counts only under its generation; memory without names is gone with its holders."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gemini.agent.memory import (
    BOUNDARY,
    TENSORS,
    WORDS_PER_RANK,
    Board,
    NodeFiles,
    create_files,
    pack_places,
    places_of,
    reached,
    step_of,
    tag,
)

generations = st.integers(0, (1 << 24) - 1)
steps = st.integers(0, (1 << 40) - 2)


@given(generation=generations, step=steps)
def test_a_word_holds_both(generation: int, step: int) -> None:
    word = tag(generation, step)
    assert 0 < word < 1 << 64 and step_of(word) == step
    assert reached(word, generation, step) and reached(word, generation, 0)
    assert not reached(word, generation, step + 1)


@given(generation=generations, other=generations, step=steps)
def test_a_step_of_another_generation_does_not_count(generation: int, other: int, step: int) -> None:
    assert reached(tag(generation, step), other, 0) == (generation == other)


def test_a_word_that_was_never_written() -> None:
    assert step_of(0) == -1
    assert not reached(0, 0, 0) and not reached(0, 1, 0)
    assert reached(tag(0, 0), 0, 0)


@given(st.sets(st.integers(0, 63)))
def test_ranks_of_a_node_in_one_word(places: set[int]) -> None:
    assert places_of(pack_places([*places, *places, 64, 100])) == sorted(places), "twice is once, and there is no room for the 65th"


@given(a=st.tuples(generations, steps), b=st.tuples(generations, steps))
def test_words_differ(a: tuple[int, int], b: tuple[int, int]) -> None:
    assert (tag(*a) == tag(*b)) == (a == b)


@pytest.fixture
def board() -> Iterator[Board]:
    fd = Board.create(3)
    words = Board(fd, 3)
    yield words
    words.close()
    os.close(fd)


def test_a_board_is_zero_and_each_word_is_its_own(board: Board) -> None:
    assert all(board.get(rank, word) == 0 for rank in range(3) for word in range(WORDS_PER_RANK))
    for rank in range(3):
        for word in range(WORDS_PER_RANK):
            board.set(rank, word, (1 << 64) - 1 - (rank * 100 + word))
    assert board.get(2, 7) == (1 << 64) - 208 and board.get(0, 0) == (1 << 64) - 1
    assert len({board.get(rank, word) for rank in range(3) for word in range(WORDS_PER_RANK)}) == 3 * WORDS_PER_RANK


def test_all_reached_needs_every_rank(board: Board) -> None:
    for rank in range(3):
        assert not board.all_reached(BOUNDARY, 1, 5)
        board.set(rank, BOUNDARY, tag(1, 5 + rank))
    assert board.all_reached(BOUNDARY, 1, 5) and not board.all_reached(BOUNDARY, 1, 6)
    assert not board.all_reached(TENSORS, 1, 5)
    assert not board.all_reached(BOUNDARY, 2, 0), "words from before a recovery count for nothing"


def test_another_process_sees_the_words() -> None:
    files = create_files(2)
    pid = os.fork()
    if pid == 0:
        Board(NodeFiles.from_text(files.to_text()).board, 2).set(1, BOUNDARY, tag(4, 9))
        os._exit(0)
    os.waitpid(pid, 0)
    board = Board(files.board, 2)
    assert board.get(1, BOUNDARY) == tag(4, 9) and board.get(0, BOUNDARY) == 0
    board.close()
    files.close()


@pytest.mark.parametrize("world", [1, 2, 7])
def test_files_are_named_in_the_environment(world: int) -> None:
    files = create_files(world)
    again = NodeFiles.from_text(files.to_text())
    assert vars(again) == vars(files)
    assert len(set(files.all())) == 3 + 3 * world  # a board, a log of others, a description
    assert not any(os.get_inheritable(fd) for fd in files.all()), "only a child that is meant to have them gets them"
    assert all(os.fstat(fd).st_nlink == 0 for fd in files.all()), "they have no name"
    files.close()
    for fd in files.all():
        with pytest.raises(OSError):
            os.fstat(fd)
