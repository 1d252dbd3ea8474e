from tcopilot.data.instructions import Instruction

ROW = {"instruction": "Name the capital.", "input": "France", "output": "Paris"}


def prompt(row=ROW, **settings):
    return Instruction(name="mine", **settings).render(row).prompt


def test_the_prompt_is_the_instruction_and_its_input_if_any():
    assert "\nName the capital.\n\nFrance\n\n###" in prompt()
    for no_input in ({}, {"input": ""}, {"input": None}):
        row = {name: text for name, text in ROW.items() if name != "input"} | no_input
        assert "\nName the capital.\n\n###" in prompt(row)


def test_columns_may_lie_within_others():
    row = {"task": {"asked": "Name the capital.", "of": "France"}, "output": "Paris"}
    assert prompt(row, prompt_column="task.asked", input="task.of") == prompt()


def test_a_template_may_use_the_columns_themselves():
    assert prompt(prompt="Do: {instruction} With: {input}") == "Do: Name the capital. With: France"
