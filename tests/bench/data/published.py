# SPDX-License-Identifier: Apache-2.0
"""Rows of our own with the columns that each set is published with."""

from typing import Any

Row = dict[str, Any]


def _choice(number: int) -> Row:
    return {
        "uuid": f"u{number}",
        "question": f"Which is the number {number}?",
        "options": ["one", "two", "three", "four", "five"],
        "answer": ["one", "two", "three", "four", "five"][number % 5],
        "answer_letter": "ABCDE"[number % 5],
        "discipline": "Science",
        "field": "Mathematics",
        "subfield": "Counting",
        "difficulty": "easy",
        "is_calculation": False,
    }


def _verl_row(number: int) -> Row:
    return {
        "prompt": [
            {"content": "Box the answer.", "role": "system"},
            {"content": f"What is {number} + 1?", "role": "user"},
        ],
        "data_source": "dapo-math",
        "ability": "math",
        "reward_model": {"ground_truth": str(number + 1) if number % 2 else "__NoCorrectAnswer__", "style": "rule"},
        "extra_info": {"index": 40 + number, "original_ground_truth": str(number + 1), "split": "train"},
    }


def _service(number: int) -> Row:
    return {
        "id": f"d{number}",
        "messages": [{"role": "user", "content": f"A Thai table for {number + 2}, please."}],
        "goal": {"food": "thai", "day": "friday", "people": str(number + 2)},
    }


PUBLISHED: dict[str, list[Row]] = {
    "light_r1": [
        {
            "conversations": [
                {"from": "user", "value": f"Add {number} and {number}."},
                {"from": "assistant", "value": f"<think>\\boxed{{1}}?</think>It is $\\boxed{{{2 * number}}}$."},
            ]
        }
        for number in range(6)
    ],
    "math500": [
        {
            "problem": f"What is ${number}/2$?",
            "solution": f"Halve it: $\\boxed{{\\frac{{{number}}}{{2}}}}$.",
            "answer": f"\\frac{{{number}}}{{2}}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": f"test/prealgebra/{number}.json",
        }
        for number in (1, 3, 5)
    ],
    "aime24": [
        {
            "id": number,
            "problem": f"Find {number}.",
            "solution": "Look.",
            "answer": f"{number:03}",
            "url": "",
            "year": "2024",
        }
        for number in (60, 61)
    ],
    "minerva_math": [
        {"question": "How fast is light, in m/s?", "answer": "3e8\n"},
        {"question": "And $1+1$?", "answer": "2"},
    ],
    "amc23": [{"id": 0, "question": "What is 9 times 3?", "answer": 27.0, "url": "there"}],
    "supergpqa": [_choice(number) for number in range(4)],
    "gpqa": [
        {
            "Record ID": f"rec{number}",
            "Question": f"Which one is even more than {number}?",
            "Correct Answer": "this one\n",
            "Incorrect Answer 1": "not this",
            "Incorrect Answer 2": "nor this",
            "Incorrect Answer 3": "never this",
            "High-level domain": "Physics",
            "Subdomain": "Optics",
        }
        for number in range(8)
    ],
    "simpleqa": [
        {"metadata": "{'topic': 'Rivers'}", "problem": "Which river flows through Bonn?", "answer": "The Rhine"},
    ],
    "hle": [
        {
            "id": "a",
            "question": "Name 1/2.",
            "image": "",
            "answer": "1/2",
            "answer_type": "exactMatch",
            "category": "Math",
        },
        {
            "id": "b",
            "question": "Pick.\nA. x\nB. y",
            "image": "",
            "answer": "B",
            "answer_type": "multipleChoice",
            "category": "Other",
        },
        {
            "id": "c",
            "question": "See.",
            "image": "data:image/png;base64,AA",
            "answer": "x",
            "answer_type": "exactMatch",
        },
    ],
    "service_dialogue": [_service(number) for number in range(3)],
    "rlvr_noisy": [
        {
            "question": f"What is {number} + 2?",
            "groundtruth_answer": str(number + 2),
            "incorrect_answer": str(number + 3),
        }
        for number in range(10)
    ],
    "olr": [_verl_row(number) for number in range(4)],
    "tinyv": [
        {
            "problem": "Write one percent.",
            "answer": "1\\%",
            "source": "orca_math",
            "domain": ["Mathematics"],
            "llama8b_solve_rate": 0.125,
            "prime_correctness": False,
            "llm_verifier_is_correct": True,
        }
    ],
}
