"""What clients ask for: nested models, whose schemas have `$defs` and `$ref`, and a tool."""

from __future__ import annotations

from pydantic import BaseModel, Field


class City(BaseModel):
    name: str
    country: str


class Person(BaseModel):
    """A person and where they live."""

    name: str
    age: int = Field(ge=0, le=150)
    home: City


class Weather(BaseModel):
    """Look up the weather of a city."""

    city: str


class Report(BaseModel):
    """The weather of a city, as the tool told it."""

    city: str
    weather: str


ANN = "Ann Smith is 31 years old. She lives in Bern, in Switzerland."
ASK = f"Extract the person: {ANN}"


def is_ann(person: Person) -> None:
    """Small models get names and numbers right; a schema gives the rest."""
    assert isinstance(person, Person) and isinstance(person.home, City)
    assert "ann" in person.name.lower() and person.age == 31, person
    assert "bern" in person.home.name.lower(), person


def get_weather(city: str) -> str:
    """Look up the weather of a city."""
    return f"It rains in {city}."
