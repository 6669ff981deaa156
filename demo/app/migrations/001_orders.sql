-- An order bought here has a quantity and a price; one imported from the old shop knows only its total.
CREATE TABLE orders (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer    text        NOT NULL,
    item        text        NOT NULL,
    quantity    integer     NOT NULL DEFAULT 1 CHECK (quantity > 0),
    unit_cents  integer     CHECK (unit_cents > 0),
    total_cents bigint      NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX orders_without_total ON orders (id) WHERE total_cents <= 0;

-- The worker's result: what each customer ordered so far.
CREATE TABLE customers (
    customer    text   PRIMARY KEY,
    orders      bigint NOT NULL,
    total_cents bigint NOT NULL
);
